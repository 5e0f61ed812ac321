"""What the paper shows, made again from runs."""

from lottery_flow import allocator

# Here, since a thread of pandas (pyarrow) takes memory as soon as it is imported.
allocator.keep_freed_memory()
