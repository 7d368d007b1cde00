"""One function for each kind of fault: it injects it, waits, undoes it, and returns the target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from faults import held
from faults.broker import Broker, together
from faults.held import Held
from faults.programs import Program
from faults.rollout import Pause, Rollout
from faults.schedule import Fault
from faults.side import Side

_DRAIN_SIDE = 15.0
_NOTICED = 40.0
_READY = 20.0
_POISONED = 40.0


class NotNow(Exception):
    """The fault cannot be injected at this moment; the user is shown the reason."""


@dataclass(frozen=True)
class World:
    """Everything that a fault can affect."""

    broker: Broker
    publishers: list[Program]
    subscribers: list[Program]
    side: Side | None
    side_exchange: str
    side_queue: str
    is_ready: Callable[[Program], bool]
    side_is_handled: Callable[[], bool]
    rollout: Rollout | None
    held: Held | None
    held_program: Program | None
    neighbours_are_handled: Callable[[], bool]
    #: Waits for the given seconds, or for the condition; returns False if that was not met.
    pause: Pause


def inject(world: World, fault: Fault) -> str:
    """Inject the fault; returns its target, in a word or two.

    :raises NotNow: it is not possible at this moment.
    """
    return _INJECTORS[fault.kind](world, fault)


# --- the broker ----------------------------------------------------------------------------------


def _kill_broker(world: World, fault: Fault) -> str:
    node = world.broker.nodes[0]
    node.kill()
    world.pause(fault.seconds)
    node.start()
    return ""


def _restart_broker(world: World, fault: Fault) -> str:
    node = world.broker.nodes[0]
    node.stop()
    world.pause(fault.seconds)
    node.start()
    return ""


def _pause_broker(world: World, fault: Fault) -> str:
    node = world.broker.nodes[0]
    node.pause()
    try:
        world.pause(fault.seconds)
    finally:
        node.resume()
    return f"{fault.seconds:.1f} s"


def _raise_alarm(world: World, fault: Fault) -> str:
    node = world.broker.nodes[0]
    node.ctl("set_vm_memory_high_watermark", "0.0001")
    try:
        world.pause(fault.seconds)
    finally:
        node.ctl("set_vm_memory_high_watermark", "0.6")
    return f"{fault.seconds:.1f} s"


def _close_connections(world: World, _fault: Fault) -> str:
    world.broker.nodes[0].ctl("close_all_connections", "as an operator may")
    return ""


def _kill_in_alarm(world: World, fault: Fault) -> str:
    """Subscribers die while their acks get through and their retries do not."""
    node = world.broker.nodes[0]
    node.ctl("set_vm_memory_high_watermark", "0.0001")
    try:
        world.pause(fault.seconds)
        return _kill_subscribers(world, fault)
    finally:
        node.ctl("set_vm_memory_high_watermark", "0.6")


def _kill_after_close(world: World, fault: Fault) -> str:
    """Subscribers die soon after the deliveries that they hold have been redelivered."""
    _close_connections(world, fault)
    world.pause(fault.seconds)
    return _kill_subscribers(world, fault)


def _kill_node(world: World, fault: Fault) -> str:
    node = world.broker.next_node()
    node.kill()
    world.pause(fault.seconds)
    node.start()
    return node.name


def _kill_majority(world: World, fault: Fault) -> str:
    nodes = [world.broker.next_node(), world.broker.next_node()]
    for node in nodes:
        node.kill()
    world.pause(fault.seconds)
    # At the same time: each may wait for the other before it responds.
    together(*(node.start for node in nodes))
    return ", ".join(node.name for node in nodes)


# --- the side exchange ---------------------------------------------------------------------------


def _delete_queue(world: World, _fault: Fault) -> str:
    """The broker cancels the consumer."""
    side = _side(world)
    with side.paused():
        _wait_until_handled(world)
        world.broker.delete(queue=world.side_queue)
    return world.side_queue


def _delete_exchange(world: World, _fault: Fault) -> str:
    """AMQP does not notify a subscriber of lost bindings; it declares them when it reconnects."""
    side = _side(world)
    with side.paused():
        _wait_until_handled(world)
        world.broker.delete(exchange=world.side_exchange)
        for proxy in world.broker.proxies:
            proxy.cut()
    return world.side_exchange


def _side(world: World) -> Side:
    assert world.side is not None, "this scenario has no side exchange"
    return world.side


def _wait_until_handled(world: World) -> None:
    if not world.pause(_DRAIN_SIDE, world.side_is_handled):
        raise NotNow("an event is in it")


# --- the network ---------------------------------------------------------------------------------


def _cut(world: World, _fault: Fault) -> str:
    number = sum(proxy.connections() for proxy in world.broker.proxies)
    for proxy in world.broker.proxies:
        proxy.cut()
    return f"{number} connections"


def _half_open(world: World, _fault: Fault) -> str:
    number = sum(proxy.connections() for proxy in world.broker.proxies)
    for proxy in world.broker.proxies:
        proxy.half_open()
    # It is over when the last client has detected it: by its heartbeat, or by an overdue confirm.
    world.pause(
        _NOTICED,
        lambda: not any(proxy.half_open_connections() for proxy in world.broker.proxies),
    )
    return f"{number} connections"


def _stall(world: World, fault: Fault) -> str:
    for proxy in world.broker.proxies:
        proxy.stall()
    return _until_it_flows(world, fault)


def _slow(world: World, fault: Fault) -> str:
    for proxy in world.broker.proxies:
        proxy.slow()
    return _until_it_flows(world, fault)


def _until_it_flows(world: World, fault: Fault) -> str:
    try:
        world.pause(fault.seconds)
    finally:
        for proxy in world.broker.proxies:
            proxy.flow()
    return f"{fault.seconds:.1f} s"


# --- the programs --------------------------------------------------------------------------------


def _one(programs: list[Program], fault: Fault) -> Program:
    return programs[fault.choice % len(programs)]


def _kill_subscriber(world: World, fault: Fault) -> str:
    program = _one(world.subscribers, fault)
    program.kill()
    return program.process_name


def _kill_subscribers(world: World, _fault: Fault) -> str:
    together(*(program.kill for program in world.subscribers))
    return f"all {len(world.subscribers)}"


def _terminate_subscriber(world: World, fault: Fault) -> str:
    program = _one(world.subscribers, fault)
    name = program.process_name
    program.terminate()
    return name


def _kill_publisher(world: World, fault: Fault) -> str:
    program = _one(world.publishers, fault)
    program.kill()
    return program.process_name


def _terminate_publisher(world: World, fault: Fault) -> str:
    program = _one(world.publishers, fault)
    name = program.process_name
    program.terminate()
    return name


def _fork_publisher(world: World, fault: Fault) -> str:
    program = _one(world.publishers, fault)
    if not world.pause(10.0, lambda: world.is_ready(program)):
        raise NotNow(f"{program.process_name} is not ready")
    program.fork()
    return program.process_name


# --- ordinary life -------------------------------------------------------------------------------


def _roll_forward(world: World, fault: Fault) -> str:
    return _rollout(world).forward(fault.seconds)


def _roll_back(world: World, fault: Fault) -> str:
    return _rollout(world).back(fault.seconds, half_way=fault.choice % 2 == 1)


def _rollout(world: World) -> Rollout:
    assert world.rollout is not None, "this scenario has no releases"
    return world.rollout


def _poison(world: World, _fault: Fault) -> str:
    """An event that kills its process each time, while the process holds others behind it."""
    held_, program = _held(world)
    before = program.deaths
    confirmed = held_.publish(held.POISONED)
    world.pause(_POISONED, world.neighbours_are_handled)
    return f"{confirmed} events, {program.deaths - before} deaths"


def _stop_in_a_row(world: World, _fault: Fault) -> str:
    """More orderly stops than the queue's delivery limit, of a process that holds many events."""
    held_, program = _held(world)
    confirmed = held_.publish(held.MANY)
    for _ in range(held.STOPS):
        world.pause(_READY, lambda: world.is_ready(program))
        name = program.process_name
        program.terminate()
        world.pause(_READY, lambda: program.process_name != name)  # noqa: B023 - called at once
    return f"{confirmed} events, {held.STOPS} stops"


def _held(world: World) -> tuple[Held, Program]:
    assert world.held is not None, "this scenario has no subscriber that holds many events"
    assert world.held_program is not None
    return world.held, world.held_program


_INJECTORS: dict[str, Callable[[World, Fault], str]] = {
    "broker-killed": _kill_broker,
    "broker-restarted": _restart_broker,
    "broker-paused": _pause_broker,
    "memory-alarm": _raise_alarm,
    "connections-closed": _close_connections,
    "killed-in-alarm": _kill_in_alarm,
    "killed-after-close": _kill_after_close,
    "queue-deleted": _delete_queue,
    "exchange-deleted": _delete_exchange,
    "wire-cut": _cut,
    "wire-stalled": _stall,
    "wire-slow": _slow,
    "wire-half-open": _half_open,
    "subscriber-killed": _kill_subscriber,
    "subscribers-killed": _kill_subscribers,
    "subscriber-terminated": _terminate_subscriber,
    "publisher-killed": _kill_publisher,
    "publisher-terminated": _terminate_publisher,
    "publisher-forked": _fork_publisher,
    "rolled-forward": _roll_forward,
    "rolled-back": _roll_back,
    "poisoned": _poison,
    "stopped-in-a-row": _stop_in_a_row,
    "node-killed": _kill_node,
    "majority-killed": _kill_majority,
}

#: The kinds of faults that can be injected.
KINDS = frozenset(_INJECTORS)
