"""The same service tested with unittest; Django's TestCase is a unittest.TestCase."""

from __future__ import annotations

import unittest

from shop import MailServer, make_subscriber, register_user

from domain_events.testing import EventBroker


class RegistrationTest(unittest.TestCase):
    def setUp(self) -> None:
        self.event_broker = EventBroker().start()
        self.addCleanup(self.event_broker.stop)
        self.addCleanup(MailServer.sent.clear)

    def test_registration_is_published(self) -> None:
        register_user("Ada", "ada@example.org")
        self.event_broker.assert_published("user.registered", {"name": "Ada"})

    def test_new_user_gets_a_mail(self) -> None:
        subscriber = make_subscriber()
        register_user("Ada", "ada@example.org")
        self.event_broker.deliver(subscriber)
        self.assertEqual(list(MailServer.sent.values()), ["ada@example.org"])


if __name__ == "__main__":
    unittest.main()
