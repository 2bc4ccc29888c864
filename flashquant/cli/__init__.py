"""`flashquant` on the command line: `main`, and a file a command."""
