from django.db import models


class Order(models.Model):
    isbn = models.CharField(max_length=13)


class Invoice(models.Model):
    order = models.ForeignKey(Order, on_delete=models.PROTECT)
