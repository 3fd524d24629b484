"""What a soft prompt means: measures, each with its statistic and its null apart from the picture."""
