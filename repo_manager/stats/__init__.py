"""Statistics that know nothing of servers: histograms, resampling, intervals, paired differences."""
