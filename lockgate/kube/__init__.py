"""Sources of objects: a folder of manifests, a watch stream."""
