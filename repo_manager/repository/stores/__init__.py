"""Where a repository is kept: folders on a disk, or objects in a bucket."""
