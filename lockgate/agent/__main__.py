"""The agent as a process."""

from lockgate.agent.main import main

raise SystemExit(main())
