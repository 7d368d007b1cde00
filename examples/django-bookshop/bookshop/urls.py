from django.urls import path

from bookshop.views import place_order

urlpatterns = [path("orders", place_order)]
