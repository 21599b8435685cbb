"""What any server needs, whatever runs the model: options, wishes of a request, counters. Imports no engine.

settings.py  the options of the server and of a request
request.py   which words of a prompt count for which image; what a cache must tell apart
metrics.py   counters for /metrics and a line in the log
"""
