"""The command `lockgate`: one module per command, loaded when it is called."""
