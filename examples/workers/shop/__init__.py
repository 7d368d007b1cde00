"""A service that sends mails."""
