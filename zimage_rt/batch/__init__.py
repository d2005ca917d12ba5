"""Many images from a file of requests, on this machine or on many: what `zimage-rt batch` does."""
