"""What every broker keeps: each test here is one guarantee, held on each of them.

RabbitMQ says what is right; the embedded broker has to agree.
"""
