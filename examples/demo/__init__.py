"""The whole way on real data: train a small LeNet under six penalties, look at its zeros, make it smaller.

cli.py trains, report.py puts the results into words, and figures.py draws them.
"""
