"""The executors: which can serve what, and how an optimizer's parameters are stepped by them."""
