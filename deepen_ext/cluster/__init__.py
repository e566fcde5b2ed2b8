"""Ray: where actors go, how they are started, what is left when they are lost. Ray is imported on use."""
