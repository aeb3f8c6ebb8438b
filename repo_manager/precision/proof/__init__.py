"""What a candidate has to prove before it is written, and where its drift began."""
