"""Forms of whole blocks, feed-forward or attention: their result is a block of smaller plain matrices."""
