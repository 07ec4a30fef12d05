"""What deploys Headgate: images, what runs beside it, and the stack as processes."""
