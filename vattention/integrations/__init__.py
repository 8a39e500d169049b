"""Put vattention's memory under the caches of existing frameworks, one package for each."""
