"""k-means, nearest centroids, nearest neighbours, Hamming search."""
