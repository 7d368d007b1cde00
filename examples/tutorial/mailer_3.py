from domain_events import Retry, Subscriber


def send_welcome_mail(event):
    print("sending a mail; retries:", event.retries)
    if event.retries == 0:  # the mail server is away, the first time
        raise Retry(delay=2.0)
    user = event.data["email"].partition("@")[0]
    print("Welcome,", user)


def make_subscriber():
    subscriber = Subscriber()
    subscriber.register(send_welcome_mail, "welcome-mail", ["user.registered"], max_retries=5)
    return subscriber


if __name__ == "__main__":
    make_subscriber().start_consuming()
