"""The client with which tests look at the broker, tools/pyamqp.py: none of its waits is endless."""

from __future__ import annotations

import impostor
import pyamqp
import pytest
from impostor import Impostor
from pika.spec import Queue
from rabbitmq_node import Node


@pytest.mark.parametrize(
    "answer",
    [b"", impostor.method(1, Queue.DeclareOk("q", 1, 0))[:9]],
    ids=["nothing", "half a frame"],
)
def test_reply_that_does_not_come_is_a_timeout(answer: bytes) -> None:
    """Nothing of it, or only the beginning of its frame."""
    with (
        Impostor(lambda socket: impostor.converse(socket, Queue.Declare, answer)) as broker,
        pyamqp.Connection(broker.url(), timeout=0.2) as connection,
        pytest.raises(TimeoutError),
    ):
        connection.channel().queue_declare("q")


def test_broker_that_accepts_and_does_not_answer_is_a_timeout(killable_node: Node) -> None:
    killable_node.pause()
    with pytest.raises(TimeoutError):
        pyamqp.Connection(killable_node.url, connect_timeout=0.2)
    killable_node.resume()


def test_connection_that_was_lost_can_be_closed(killable_node: Node) -> None:
    """Each further method on it raises an error."""
    connection = pyamqp.Connection(killable_node.url)
    channel = connection.channel()
    killable_node.kill()
    with pytest.raises(pyamqp.ERRORS):
        channel.queue_declare("q")
    connection.close()
    connection.close()
