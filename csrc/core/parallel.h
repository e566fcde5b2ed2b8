// Rows in parallel. Threads are started per call: a start costs some 15 microseconds, a share's work more,
// and nothing stays behind that a fork or the interpreter's exit could trip over.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

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
  std::vector<std::thread> others;
  others.reserve(size_t(used - 1));
  for (int64_t i = 1; i < used; ++i) {
    others.emplace_back([&work, i, used, count] { work(int(i), count * i / used, count * (i + 1) / used); });
  }
  work(0, int64_t{0}, count / used);
  for (auto& other : others) other.join();
}

// Calls work(thread, row) for each row of [0, count), each thread taking the next row that nobody has: the
// second thread may get half a core or none, since torch's own threads spin for a while after their work.
template <class Work>
void parallel_rows(int64_t count, int threads, const Work& work) {
  std::atomic<int64_t> next{0};
  const int64_t used = count < threads ? count : threads;
  parallel_for(used, int(used), [&](int thread, int64_t, int64_t) {
    for (int64_t row = next++; row < count; row = next++) work(thread, row);
  });
}

}  // namespace deepen
