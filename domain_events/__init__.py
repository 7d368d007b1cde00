"""Domain events over RabbitMQ."""

__version__ = "0.1.0"
