from mailer import make_subscriber

from domain_events import publish_domain_event


def test_mail_is_sent_when_the_server_is_back(event_broker, capsys):
    subscriber = make_subscriber()
    publish_domain_event("user.registered", {"email": "ada@example.org"})

    [first] = event_broker.deliver(subscriber)
    assert (first.outcome, first.delay) == ("retry", 2.0)

    event_broker.advance(2.0)
    [second] = event_broker.deliver(subscriber)
    assert second.outcome == "handled"
    assert "Welcome, ada" in capsys.readouterr().out
