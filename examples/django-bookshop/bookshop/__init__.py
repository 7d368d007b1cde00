"""A shop in Django: an order is placed by a request, and its invoice is issued by a handler."""
