"""The HTTP parts that all kinds of jobs share: reading the request, common routes, and following a job."""
