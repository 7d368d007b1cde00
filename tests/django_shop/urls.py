"""The shop's pages."""

from django.contrib import admin
from django.urls import path

from django_shop import views

urlpatterns = [path("place/<str:name>", views.place), path("admin/", admin.site.urls)]
