"""The whole workflow on real data: train a small LeNet under six penalties, show its zeros, make it smaller.

cli.py trains, report.py puts the results into words, and figures.py draws them.
"""
