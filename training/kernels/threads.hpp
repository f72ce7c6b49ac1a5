#pragma once

#include <algorithm>
#include <thread>
#include <vector>

// Shares `n_items` out among threads: calls work(first item, number of items) on each.
template <typename Work>
void share(long n_items, long n_threads, const Work& work) {
  n_threads = std::max(1L, std::min(n_threads, n_items));
  const auto first = [&](long i) { return n_items * i / n_threads; };
  std::vector<std::thread> others;
  for (long i = 1; i < n_threads; ++i)
    others.emplace_back([&, i] { work(first(i), first(i + 1) - first(i)); });
  work(0, first(1));
  for (std::thread& thread : others) thread.join();
}
