"""What we want: policy files, their schema, and their loader. Knows no service that obeys them."""
