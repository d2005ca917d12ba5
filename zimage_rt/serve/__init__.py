"""`zimage-rt serve`: a web process that speaks OpenAI's, A1111's and its own API, and an engine process that generates.

The web process imports no inference library. The engine owns the pipeline and runs one job after another; when it dies,
the job at work fails, no other does, and it is started again.
"""
