"""What the shop stores."""

from django.db import models


class Order(models.Model):
    name = models.TextField(unique=True)


class Invoice(models.Model):
    order = models.TextField()
