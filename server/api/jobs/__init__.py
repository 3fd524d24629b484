"""What jobs of every kind share over HTTP: reading what is asked for, the routes, and following a job."""
