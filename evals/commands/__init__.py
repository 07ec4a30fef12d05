"""What `headgate gate` and its siblings do when they are typed. A module a command or family."""
