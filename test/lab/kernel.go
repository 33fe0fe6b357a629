// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bufio"
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
)

// KernelVar names the environment variable that chooses the kernel where Config.Kernel is empty.
const KernelVar = "VIRTEXIT_LAB_KERNEL"

// DefaultKernel is booted where neither Config.Kernel nor the environment names one.
const DefaultKernel = "6.1"

// Kernel is a Debian kernel package, unpacked but not installed, or a debug kernel.
type Kernel struct {
	Release string // as uname -r prints it
	Dir     string // the package's root: boot/ and lib/ are below
}

// Image is the path of the bootable kernel.
func (k Kernel) Image() string { return filepath.Join(k.Dir, "boot", "vmlinuz-"+k.Release) }

// Modules is the path of the module tree, with modules.dep.
func (k Kernel) Modules() string { return filepath.Join(k.Dir, "lib", "modules", k.Release) }

// FindKernel finds the kernel of a version, see Release. Unless a former call has, it fetches the kernel with apt and
// unpacks it below build/lab.
func FindKernel(version string) (Kernel, error) {
	release, err := Release(version)
	if err != nil {
		return Kernel{}, err
	}
	cache, unlock, err := lockedCache("kernels")
	if err != nil {
		return Kernel{}, err
	}
	defer unlock()
	k := Kernel{release, filepath.Join(cache, release)}
	if !exists(k.Dir) {
		if err := k.fetch(); err != nil {
			return Kernel{}, fmt.Errorf("fetch kernel %s: %w", release, err)
		}
	}
	return k, nil
}

// series matches a version that is no release: "6.1", "6.1-rt", "6.1-arm64".
var series = regexp.MustCompile(`^(\d+\.\d+)(-cloud|-rt|-debug|-arm64)?$`)

// Release turns a version into a release, as uname -r prints it. A series such as "6.1" means the release that Debian's
// own package depends on; "6.1-cloud" and "6.1-rt" that of another flavour, "6.1-arm64" that of another architecture,
// "6.1-debug" what "make lab-debug-kernel" has built. Anything else, such as "6.1.0-56-amd64", is a release. Empty means $VIRTEXIT_LAB_KERNEL, then DefaultKernel.
func Release(version string) (string, error) {
	version = cmp.Or(version, os.Getenv(KernelVar), DefaultKernel)
	match := series.FindStringSubmatch(version)
	if match == nil {
		return version, nil
	}
	number, flavour := match[1], match[2]
	if flavour == "-debug" {
		return debugRelease(number)
	}
	var options []string
	if flavour == "-arm64" {
		var err error
		if options, err = foreignApt(); err != nil {
			return "", fmt.Errorf("find kernel %s: %w", version, err)
		}
	} else {
		flavour += "-amd64"
	}
	// The series that a Debian release ships has no meta package with its number.
	for _, meta := range []string{"linux-image-" + number + flavour, "linux-image" + flavour} {
		out, err := exec.Command("apt-cache", append(options, "depends", "--important", meta)...).Output()
		if errors.Is(err, exec.ErrNotFound) {
			return "", fmt.Errorf("find kernel %s: %w", version, err)
		}
		for line := range strings.Lines(string(out)) {
			release, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: linux-image-")
			if ok && strings.HasPrefix(release, number+".") {
				return release, nil
			}
		}
	}
	return "", fmt.Errorf("apt knows no kernel %s (has apt-get update been run?)", version)
}

func debugRelease(number string) (string, error) {
	cache, err := buildDir("kernels")
	if err != nil {
		return "", err
	}
	built, err := filepath.Glob(filepath.Join(cache, number+".*-debug"))
	if err != nil || len(built) == 0 {
		return "", fmt.Errorf("there is no debug kernel %s: make lab-debug-kernel", number)
	}
	return filepath.Base(built[len(built)-1]), nil
}

// fetch makes k.Dir appear complete or not at all. With an arm64 kernel it holds a busybox for it.
func (k Kernel) fetch() error {
	packages := []string{"linux-image-" + k.Release}
	var options []string
	if arm64(k.Release) {
		packages = append(packages, "busybox-static")
		var err error
		if options, err = foreignApt(); err != nil {
			return err
		}
	}
	return unpack(k.Dir, packages, func(root string) error {
		return run(root, "depmod", "-b", root, k.Release)
	}, options...)
}

// unpack downloads packages with apt and unpacks them below dir, without installing them. The directory appears when all
// is there and finish has succeeded, or not at all. The options are apt's.
func unpack(dir string, packages []string, finish func(root string) error, options ...string) error {
	tmp, err := os.MkdirTemp(filepath.Dir(dir), "fetch-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if err := os.Chmod(tmp, 0o755); err != nil {
		return err
	}
	// apt's own user may not write below a private directory.
	args := slices.Concat([]string{"download", "-qq", "-o", "APT::Sandbox::User=root"}, options, packages)
	if err := run(tmp, "apt-get", args...); err != nil {
		return err
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(debs) != len(packages) {
		return fmt.Errorf("apt-get download left %d packages, want %d", len(debs), len(packages))
	}
	root := filepath.Join(tmp, "root")
	for _, deb := range debs {
		if err := run(tmp, "dpkg-deb", "-x", deb, root); err != nil {
			return err
		}
	}
	if err := finish(root); err != nil {
		return err
	}
	return os.Rename(root, dir)
}

// FindHeaders returns the directory to build modules for a release in: that of the running system or of a debug kernel
// where there is one, otherwise Debian's header packages, fetched with apt and unpacked below build/lab.
func FindHeaders(release string) (string, error) {
	kernels, err := buildDir("kernels")
	if err != nil {
		return "", err
	}
	for _, root := range []string{"/", filepath.Join(kernels, release)} {
		if dir := filepath.Join(root, "lib/modules", release, "build"); exists(filepath.Join(dir, "Makefile")) {
			return dir, nil
		}
	}
	cache, unlock, err := lockedCache("headers")
	if err != nil {
		return "", err
	}
	defer unlock()
	dir := filepath.Join(cache, release)
	headers := filepath.Join(dir, "usr/src/linux-headers-"+release)
	if exists(dir) {
		return headers, nil
	}
	// What they need of one another: the common headers and the programs of kbuild.
	packages := []string{"linux-headers-" + release}
	out, err := exec.Command("apt-cache", "depends", "--important", packages[0]).Output()
	if err != nil {
		return "", fmt.Errorf("apt knows no package %s (has apt-get update been run?)", packages[0])
	}
	for line := range strings.Lines(string(out)) {
		name, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: ")
		if ok && (strings.HasPrefix(name, "linux-headers-") || strings.HasPrefix(name, "linux-kbuild-")) {
			packages = append(packages, name)
		}
	}
	err = unpack(dir, packages, func(root string) error {
		// It includes the common one by the path that it would be installed at.
		makefile := filepath.Join(root, "usr/src/linux-headers-"+release, "Makefile")
		text, err := os.ReadFile(makefile)
		if err != nil {
			return err
		}
		text = bytes.ReplaceAll(text, []byte("/usr/src"), []byte(filepath.Join(dir, "usr/src")))
		return os.WriteFile(makefile, text, 0o644)
	})
	if err != nil {
		return "", fmt.Errorf("fetch headers of kernel %s: %w", release, err)
	}
	return headers, nil
}

var packageID = regexp.MustCompile(`LINUX_PACKAGE_ID " Debian (\S+)"`)

// FindSource returns a directory with the source of a kernel, or of KVM alone, arch/x86/kvm and virt/kvm, out of Debian's
// linux-source package of exactly the version that the headers of the release have, fetched with apt.
func FindSource(release string, whole bool) (string, error) {
	if strings.Contains(release, "-rt-") {
		return "", fmt.Errorf("kernel %s has patches of its own that linux-source lacks", release)
	}
	headers, err := FindHeaders(release)
	if err != nil {
		return "", err
	}
	file := filepath.Join(headers, "include/generated/package.h")
	text, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	id := packageID.FindSubmatch(text)
	if id == nil {
		return "", fmt.Errorf("%s tells no version of a Debian package", file)
	}
	version := string(id[1])
	major, rest, _ := strings.Cut(release, ".")
	minor, _, _ := strings.Cut(rest, ".")
	name := "linux-source-" + major + "." + minor

	cache, unlock, err := lockedCache("sources")
	if err != nil {
		return "", err
	}
	defer unlock()
	dir := filepath.Join(cache, name+"_"+version)
	parts := []string{name + "/arch/x86/kvm", name + "/virt/kvm"}
	if whole {
		dir += "_whole"
		parts = []string{name}
	}
	if exists(dir) {
		return dir, nil
	}
	out, err := exec.Command("apt-cache", "madison", name).Output()
	if err != nil {
		return "", fmt.Errorf("find the versions of %s: %w", name, err)
	}
	var offered []string
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line) // name | version | where
		if len(fields) > 4 && strings.HasSuffix(line, "Packages\n") && !slices.Contains(offered, fields[2]) {
			offered = append(offered, fields[2])
		}
	}
	if !slices.Contains(offered, version) {
		return "", fmt.Errorf("linux-headers-%s is of version %s, and %s must be of the same, but apt offers %s (has apt-get update been run?)",
			release, version, name, cmp.Or(strings.Join(offered, ", "), "none"))
	}
	err = unpack(dir, []string{name + "=" + version}, func(root string) error {
		// The kernel has a folder usr as well.
		pkg := filepath.Join(filepath.Dir(root), "package")
		if err := errors.Join(os.Rename(root, pkg), os.Mkdir(root, 0o755)); err != nil {
			return err
		}
		tarball := filepath.Join(pkg, "usr/src", name+".tar.xz")
		return run(root, "tar", append([]string{"-xJf", tarball, "--strip-components=1"}, parts...)...)
	})
	if err != nil {
		return "", fmt.Errorf("fetch %s %s: %w", name, version, err)
	}
	return dir, nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// lockedCache makes build/lab/name and keeps other processes out of it until unlock.
func lockedCache(name string) (dir string, unlock func(), err error) {
	if dir, err = buildDir(name); err != nil {
		return "", nil, err
	}
	lock, err := os.Create(filepath.Join(dir, "lock"))
	if err != nil {
		return "", nil, err
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		lock.Close()
		return "", nil, fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	return dir, func() { lock.Close() }, nil
}

// Closure lists the files of the named modules and of all that they need, in the order of insertion. Modules that are
// part of the kernel image need no file.
func (k Kernel) Closure(modules []string) ([]string, error) {
	if len(modules) == 0 {
		return nil, nil
	}
	args := append([]string{"-d", k.Dir, "-S", k.Release, "-a", "--show-depends", "--"}, modules...)
	cmd := exec.Command(tool("modprobe"), args...)
	cmd.Env = append(os.Environ(), "MODPROBE_OPTIONS=")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("modules of %s: %w: %s", k.Release, err, bytes.TrimSpace(stderr.Bytes()))
	}
	var files []string
	seen := map[string]bool{}
	for lines := bufio.NewScanner(bytes.NewReader(out)); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) >= 2 && fields[0] == "insmod" && !seen[fields[1]] {
			seen[fields[1]] = true
			files = append(files, fields[1])
		}
	}
	return files, nil
}

// buildDir makes build/lab/name in the repository that the working directory is part of.
func buildDir(name string) (string, error) {
	wd, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for dir := wd; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			build := filepath.Join(dir, "build", "lab", name)
			return build, os.MkdirAll(build, 0o755)
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("%s is in no Go module: the lab keeps its files in the repository", wd)
		}
	}
}

// run runs a host command whose output matters only when it fails.
func run(dir, name string, args ...string) error {
	cmd := exec.Command(tool(name), args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, bytes.TrimSpace(out))
	}
	return nil
}

// tool finds a command that may live in a directory that only root's PATH holds.
func tool(name string) string {
	if path, err := exec.LookPath(name); err == nil {
		return path
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path
		}
	}
	return name
}
