import os

# the networks of the tests are so small that threads cost more in waiting for one another than they save; set before
# torch is imported, and inherited by the command lines that tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")
