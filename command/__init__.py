"""What `headgate` does when it is typed: serve, chat, doctor, policy. A module a command."""
