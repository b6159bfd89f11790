"""What would happen: questions, the specification's answer and the kernel's."""
