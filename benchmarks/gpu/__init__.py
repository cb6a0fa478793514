"""The first hour on a GPU: what it computes, how fast, and with how many launches (`examples/first_gpu_hour.sh`)."""
