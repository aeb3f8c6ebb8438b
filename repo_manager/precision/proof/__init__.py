"""What a candidate must prove before it is written, and where its drift began."""
