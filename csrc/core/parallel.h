// Rows in parallel, on the threads that torch uses too.
//
// Both come from one OpenMP runtime (torch brings it and is loaded first, so the name in our library finds
// torch's). A pool of our own would meet torch's: its threads spin for some milliseconds after each of its
// own operations, and on a machine that has no processor to spare ours would wait for them. Measured on two
// cores, V 262,144, 8 rows, right after a softmax of torch's: 1,390 microseconds on threads of our own, 620
// on torch's. As with torch, a process that was forked after such a call must not make another one on several
// threads: it would wait for ever (deepen_ext/ground/forks.py sees to it).
//
// Without OpenMP, threads are started per call; the calling thread does the work of those that cannot start.
#pragma once

#include <atomic>
#include <cstdint>

#ifndef _OPENMP
#include <new>
#include <system_error>
#include <thread>
#include <vector>
#endif

namespace deepen {

// How many threads to use of those allowed, if a thread is worth its start only with `least` units of work. A
// thread that waits for another one waits for the scheduler wherever other processes are busy: some
// milliseconds.
inline int worthwhile_threads(int allowed, int64_t work, int64_t least) {
  const int64_t worth = work / least;
  return worth < 1 ? 1 : worth < allowed ? int(worth) : allowed;
}

// Calls work(thread, begin, end) over contiguous shares of [0, count); work must not throw.
template <class Work>
void parallel_for(int64_t count, int threads, const Work& work) {
  const int64_t used = count < threads ? count : threads;
  if (used <= 1) {
    if (count > 0) work(0, int64_t{0}, count);
    return;
  }
#ifdef _OPENMP
  // By as many threads as torch has, even where some have nothing to do: a smaller team would end the others,
  // and torch's next operation would start them again.
#pragma omp parallel for schedule(static, 1)
  for (int64_t i = 0; i < used; ++i) work(int(i), count * i / used, count * (i + 1) / used);
#else
  const auto share = [&work, used, count](int64_t i) {
    work(int(i), count * i / used, count * (i + 1) / used);
  };
  std::vector<std::thread> others;
  others.reserve(size_t(used - 1));
  try {
    for (int64_t i = 1; i < used; ++i) others.emplace_back(share, i);
  } catch (const std::system_error&) {  // no thread more, or no memory for it: its share is done here
  } catch (const std::bad_alloc&) {
  }
  for (int64_t i = int64_t(others.size()) + 1; i < used; ++i) share(i);
  share(0);
  for (auto& other : others) other.join();
#endif
}

// Calls work(thread, row) for each row of [0, count), each thread taking the next row that nobody has: the
// second thread may get half a processor or none.
template <class Work>
void parallel_rows(int64_t count, int threads, const Work& work) {
  std::atomic<int64_t> next{0};
  const int64_t used = count < threads ? count : threads;
  parallel_for(used, int(used), [&](int thread, int64_t, int64_t) {
    for (int64_t row = next++; row < count; row = next++) work(thread, row);
  });
}

}  // namespace deepen
