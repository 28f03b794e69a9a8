"""Where runs are: directories, buckets and memory, and who may write there."""
