from domain_events import Subscriber


def send_welcome_mail(event):
    print("Welcome,", event.data["email"])


def make_subscriber():
    subscriber = Subscriber()
    subscriber.register(send_welcome_mail, "welcome-mail", ["user.registered"])
    return subscriber


if __name__ == "__main__":
    make_subscriber().start_consuming()
