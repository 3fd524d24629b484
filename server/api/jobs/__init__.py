"""What jobs of every kind share over HTTP: reading the request, common routes, and following a job."""
