#include <torch/csrc/inductor/cpp_prefix.h>
#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>

namespace {

// A tensor within a loop: where it is. How it lies there is known where it is used.
struct Memory {
  char* p;
  void* data_ptr() const { return p; }
  Memory at(int64_t bytes) const { return {p + bytes}; }
  void reset() const {}
};

template <typename Tensor>
Memory memory_of(const Tensor& x) {
  void* p;
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(x, &p));
  return {static_cast<char*>(p)};
}

inline void fill(AtenTensorHandle x, Memory from, int64_t bytes) {
  void* p;
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(x, &p));
  std::memcpy(p, from.p, bytes);
}

// What is written in place stays where it is.
inline void check_same(Memory x, Memory first) {
  if (x.p != first.p) throw std::runtime_error("rows of a loop have moved");
}

// The memory of a round, twice: rounds take the one and the other in turn.
class Arena {
 public:
  explicit Arena(int64_t bytes) : bytes_(bytes), held_(new char[2 * bytes + 64]) {
    first_ = held_.get() + (64 - reinterpret_cast<uintptr_t>(held_.get()) % 64) % 64;
  }
  Memory at(int64_t round, int64_t offset) const {
    return {first_ + (round & 1) * bytes_ + offset};
  }

 private:
  int64_t bytes_;
  std::unique_ptr<char[]> held_;
  char* first_;
};

// R rows of c = d + a b, along the columns of b, which are next to one another in memory.
template <typename T, bool ADDED, int64_t R, int64_t N, int64_t K, int64_t AR, int64_t AC,
          int64_t BR, int64_t CR, int64_t CC, int64_t DR, int64_t DC>
inline void rows(T* c, const T* a, const T* b, const T* d) {
  using V = at::vec::Vectorized<T>;
  constexpr int64_t lanes = V::size();
  for (int64_t j = 0; j < N; j += lanes) {
    const int64_t n = std::min(lanes, N - j);
    V sum[R];
#pragma GCC unroll 8
    for (int64_t r = 0; r < R; ++r) {
      if constexpr (!ADDED) {
        sum[r] = V(0);
      } else if constexpr (DC == 1) {
        sum[r] = V::loadu(d + r * DR + j, n);
      } else if constexpr (DC == 0) {
        sum[r] = V(d[r * DR]);
      } else {
        T row[lanes] = {};
        for (int64_t i = 0; i < n; ++i) row[i] = d[r * DR + (j + i) * DC];
        sum[r] = V::loadu(row);
      }
    }
    for (int64_t k = 0; k < K; ++k) {
      const V y = V::loadu(b + k * BR + j, n);
#pragma GCC unroll 8
      for (int64_t r = 0; r < R; ++r) {
        sum[r] = at::vec::fmadd(V(a[r * AR + k * AC]), y, sum[r]);
      }
    }
#pragma GCC unroll 8
    for (int64_t r = 0; r < R; ++r) {
      if constexpr (CC == 1) {
        sum[r].store(c + r * CR + j, n);
      } else {
        T row[lanes];
        sum[r].store(row);
        for (int64_t i = 0; i < n; ++i) c[r * CR + (j + i) * CC] = row[i];
      }
    }
  }
}

// c = d + a b for one pair of matrices after the other.
template <typename T, bool ADDED, int64_t BATCH, int64_t M, int64_t N, int64_t K,
          int64_t AB, int64_t AR, int64_t AC, int64_t BB, int64_t BR, int64_t BC,
          int64_t CB, int64_t CR, int64_t CC, int64_t DB, int64_t DR, int64_t DC>
inline void product(Memory c_, Memory a_, Memory b_, Memory d_ = {nullptr}) {
  constexpr int64_t R = std::min<int64_t>(M, 8), rest = M % R;
  for (int64_t i = 0; i < BATCH; ++i) {
    T* c = reinterpret_cast<T*>(c_.p) + i * CB;
    const T* a = reinterpret_cast<const T*>(a_.p) + i * AB;
    const T* b = reinterpret_cast<const T*>(b_.p) + i * BB;
    const T* d = ADDED ? reinterpret_cast<const T*>(d_.p) + i * DB : nullptr;
    constexpr bool packs = BC != 1 && N > 1;
    constexpr int64_t Q = packs ? N : BR;
    alignas(64) T packed[packs ? K * N : 1];
    if constexpr (packs) {
      for (int64_t j = 0; j < N; ++j) {
        for (int64_t k = 0; k < K; ++k) packed[k * N + j] = b[k * BR + j * BC];
      }
      b = packed;
    }
    int64_t m = 0;
    for (; m + R <= M; m += R) {
      rows<T, ADDED, R, N, K, AR, AC, Q, CR, CC, DR, DC>(c + m * CR, a + m * AR, b, d + m * DR);
    }
    if constexpr (rest > 0) {
      rows<T, ADDED, rest, N, K, AR, AC, Q, CR, CC, DR, DC>(c + m * CR, a + m * AR, b, d + m * DR);
    }
  }
}

} // namespace
