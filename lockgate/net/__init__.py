"""Network namespaces, links, routes, neighbours and cgroups: what netlink and /proc offer."""
