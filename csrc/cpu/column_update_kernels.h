// CPU kernel of column_update on a run of gathered elements. Included by each_isa.h for each
// instruction set, hence no guard.
namespace dropbp::DROPBP_ISA {
namespace {  // another file has other Kernels

struct Kernels {
  // sums = originals + scale * deltas in W, rounded once to T.
  template <class W, class T, class D>
  static void update_run(T* sums, const T* originals, const D* deltas, W scale, int64_t count) {
    constexpr int kStep = kLanes<W>;
    int64_t i = 0;
    for (; i + kStep <= count; i += kStep) {
      store<W>(sums + i, load<W>(originals + i) + scale * load<W>(deltas + i));
    }
    if (i < count) {
      const int64_t rest = count - i;
      store_part<W>(sums + i,
                    load_part<W>(originals + i, rest) + scale * load_part<W>(deltas + i, rest),
                    rest);
    }
  }
};

}  // namespace
}  // namespace dropbp::DROPBP_ISA
