"""What a job leaves on disk: the lease on its folder, the journal, a block's records and shard, the finished output."""
