"""What things cost, as ratios within one process."""

from lottery_flow import allocator

# As the commands do. Here, since a thread of pandas (pyarrow) takes memory as soon as
# it is imported.
allocator.keep_freed_memory()
