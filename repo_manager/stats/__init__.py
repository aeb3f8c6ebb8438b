"""Statistics independent of servers: histograms, resampling, intervals, paired differences."""
